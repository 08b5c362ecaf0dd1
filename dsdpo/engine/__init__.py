"""All of DeepSpeed."""
