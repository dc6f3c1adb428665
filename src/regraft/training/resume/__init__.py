"""The state of a run: written while it trains, and read to go on."""
