"""What a fine-tuned model gained, what it kept of its base, and how far its layers moved."""
