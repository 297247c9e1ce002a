"""Measures of a trained classifier, one file for each question.

Functions are pure: (key, logits_fn or log_density, x, …) -> arrays, under jit and vmap and of any classifier. A key is
one PRNG key, or one per example [B]; an example's result depends on its own key alone. Measures of what was found take
NumPy arrays, in float64.
"""
