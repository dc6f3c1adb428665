"""What a step of training consists of: device and precision, parts of a batch, running totals."""
