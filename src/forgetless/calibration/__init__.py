"""Drive a base model over data and fill second moments, once per tensor that feeds target layers."""
