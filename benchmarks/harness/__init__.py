"""What all benchmarks are made of: options, inputs, sides that take turns, figures of a pair, result files."""
