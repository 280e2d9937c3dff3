// pause holds a pod's namespaces. It is PID 1 of pods that share their process namespace, so it reaps
// orphans; it ends at once on SIGTERM and SIGINT, which PID 1 would otherwise ignore. It is written in C
// because there is one per pod: one thread, no heap.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

static void stop(int signal) {
	(void)signal;
	_exit(0);
}

static void reap(int signal) {
	(void)signal;
	while (waitpid(-1, NULL, WNOHANG) > 0) {
	}
}

int main(void) {
	struct sigaction on_stop = {.sa_handler = stop};
	struct sigaction on_child = {.sa_handler = reap, .sa_flags = SA_NOCLDSTOP};

	if (sigaction(SIGTERM, &on_stop, NULL) < 0 || sigaction(SIGINT, &on_stop, NULL) < 0 ||
	    sigaction(SIGCHLD, &on_child, NULL) < 0) {
		return 1;
	}
	for (;;) {
		pause();
	}
}
