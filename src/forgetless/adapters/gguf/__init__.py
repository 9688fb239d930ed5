"""LoRA adapters as GGUF files for llama.cpp: written, read back, held to its rules."""
