"""Write a network as Python source."""
