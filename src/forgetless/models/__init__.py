"""What has to be known about Hugging Face models: loading, devices, target layers. No maths."""
