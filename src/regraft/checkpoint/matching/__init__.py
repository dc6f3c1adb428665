"""Find which tensor of a file belongs to which of a network, and put it there."""
