"""What the stages compute with: pure functions over tensors. No files, no models, no configuration."""
