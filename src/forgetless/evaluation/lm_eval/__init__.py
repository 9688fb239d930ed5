"""EleutherAI's lm-eval on the live model and on its base: its tasks as evaluation items."""
