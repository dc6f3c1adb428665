"""What a network looked at in a photo: maps, and how they are drawn."""
