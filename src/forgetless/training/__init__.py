"""Training an attached adapter with TRL's SFTTrainer, resumable after a kill."""
