"""The scene of `tests/scene.py`, for runs that check while they train."""

from scene import fit as fit
from scene import net_file as net_file
from scene import photos as photos
from scene import tiny_net as tiny_net
from scene import workplace as workplace
