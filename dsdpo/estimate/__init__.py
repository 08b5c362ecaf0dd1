"""What a run will take, before it is started: bytes on each device, host and disk, and seconds for each step."""
