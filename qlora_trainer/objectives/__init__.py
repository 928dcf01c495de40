"""What training minimises: the log-likelihoods of a micro-batch's tokens become a loss.

In: `model.forward.TokenNll`. Out: a float32 scalar, the *sum* that the loop divides by the weight of the
whole optimizer step; autograd takes the gradient back to the tokens. One file an objective.
"""
