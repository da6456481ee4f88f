"""Causal effects on top of hooks."""

from imaginelens.mediation.counterfactuals import counterfactuals as counterfactuals
from imaginelens.mediation.dependence import forwards_needed as forwards_needed
from imaginelens.mediation.dependence import input_dependence as input_dependence
from imaginelens.mediation.dependence_result import Dependence as Dependence
from imaginelens.mediation.edit_effects import EditEffect as EditEffect
from imaginelens.mediation.edit_effects import Necessity as Necessity
from imaginelens.mediation.effects import Effects as Effects
from imaginelens.mediation.errors import ControlError as ControlError
from imaginelens.mediation.interchange import Interchange as Interchange
from imaginelens.mediation.interchange import interchange as interchange
from imaginelens.mediation.interventional import Interventional as Interventional
from imaginelens.mediation.interventional import interventional as interventional
from imaginelens.mediation.necessity import necessity as necessity
from imaginelens.mediation.outcomes import PotentialOutcomes as PotentialOutcomes
