"""What patches DeepSpeed or relies on its private behaviour; docs/deepspeed-quirks.md lists each."""
