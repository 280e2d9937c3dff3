package controller

import (
	"context"
	"errors"

	authenticationv1 "k8s.io/api/authentication/v1"
	"sigs.k8s.io/controller-runtime/pkg/log"
	"sigs.k8s.io/controller-runtime/pkg/webhook/authentication"

	"h8s.io/hypernetes/internal/identity"
)

// TokenValidator says who a token is of. The error is an *identity.Refusal if it is
// nobody's.
type TokenValidator interface {
	Validate(ctx context.Context, token string) (*identity.Identity, error)
}

// tokenReviewWebhook answers reviews by a validator. A reason never has a token in it:
// the API server writes it to its log.
type tokenReviewWebhook struct{ tokens TokenValidator }

// Handle implements authentication.Handler.
func (w *tokenReviewWebhook) Handle(ctx context.Context, req authentication.Request) authentication.Response {
	id, err := w.tokens.Validate(ctx, req.Spec.Token)
	if err != nil {
		if refusal := new(identity.Refusal); !errors.As(err, &refusal) {
			log.FromContext(ctx).Error(err, "a token could not be validated")
		}
		return authentication.ReviewResponse(false, authenticationv1.UserInfo{}, err.Error())
	}
	user := authenticationv1.UserInfo{Username: id.Username, UID: id.UID, Groups: id.Groups, Extra: map[string]authenticationv1.ExtraValue{}}
	for key, values := range id.Extra {
		user.Extra[key] = values
	}
	return authentication.ReviewResponse(true, user, "")
}
