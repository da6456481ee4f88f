"""Tiny trained models with a known mechanism: the task, the checkpoints, and how to open them."""

from imaginelens.organisms.checkpoint import available as available
from imaginelens.organisms.organism import Organism as Organism
from imaginelens.organisms.organism import load as load
