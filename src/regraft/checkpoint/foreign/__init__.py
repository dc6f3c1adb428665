"""Read the weights in files of others, without executing anything of them."""
