"""Drive a base model over data and fill second moments, one per tensor that feeds target layers."""
