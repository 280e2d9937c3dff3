/* seccomp-filter writes to standard output the BPF program that crun makes of the seccomp
   profile in the specification of a container, which it reads from standard input. It is
   built with crun's own code: see images/guest/crun.go, and package internal/hyper/seccomp. */

#include <config.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#include "libcrun/container.h"
#include "libcrun/error.h"
#include "libcrun/seccomp.h"
#include "libcrun/utils.h"

/* Before main, crun's library copies the program that it is in, or mounts it read-only, and
   starts it again, so that no container can write to it. No container comes near this one. */
int
__wrap_ensure_cloned_binary (void)
{
  return 0;
}

int
main (void)
{
  libcrun_error_t err = NULL;
  libcrun_error_t *failure = &err; /* what reports an error clears the pointer to it */
  struct libcrun_seccomp_gen_ctx_s filter;
  libcrun_container_t *container;
  char *specification = NULL;
  size_t length = 0;

  if (read_all_fd (STDIN_FILENO, "standard input", &specification, &length, &err) < 0)
    goto fail;
  container = libcrun_container_load_from_memory (specification, &err);
  if (container == NULL)
    goto fail;
  libcrun_seccomp_gen_ctx_init (&filter, container, true, LIBCRUN_SECCOMP_SKIP_CACHE);
  filter.fd = STDOUT_FILENO;
  if (libcrun_generate_seccomp (&filter, &err) < 0)
    goto fail;
  return EXIT_SUCCESS;

fail:
  libcrun_error_write_warning_and_release (stderr, &failure);
  return EXIT_FAILURE;
}
