"""Causal effects on top of hooks."""

from imaginelens.mediation.interchange import Interchange as Interchange
from imaginelens.mediation.interchange import interchange as interchange
