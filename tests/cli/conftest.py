"""The scene of `tests/scene.py`: each test runs in a folder of its own."""

from scene import cli as cli
from scene import fit as fit
from scene import net_file as net_file
from scene import photos as photos
from scene import saved as saved
from scene import tiny_net as tiny_net
from scene import train_words as train_words
from scene import workplace as workplace
