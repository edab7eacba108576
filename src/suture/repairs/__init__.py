"""Representation Surgery: small modules that bring a merged model's features back to those of its experts."""

from suture.repairs.blended_model import BlendModel
from suture.repairs.model import SurgeryModel, TaskModel
from suture.repairs.modules import SurgeryModules
from suture.repairs.network import FINAL, Block, find_blocks
from suture.repairs.online import OnlineResult, online
from suture.repairs.problem import ForwardPasses, Problem
from suture.repairs.repair import SURGERIES, get_surgery, knobs_of, repair
from suture.repairs.representation import Distances, Representation, linear_cka, project, representation
from suture.repairs.results import SurgeryResult
from suture.repairs.router import CentroidRouter, LinearRouter, fit_router, routing_accuracy

__all__ = [
    "FINAL",
    "SURGERIES",
    "BlendModel",
    "Block",
    "CentroidRouter",
    "Distances",
    "ForwardPasses",
    "LinearRouter",
    "OnlineResult",
    "Problem",
    "Representation",
    "SurgeryModel",
    "SurgeryModules",
    "SurgeryResult",
    "TaskModel",
    "find_blocks",
    "fit_router",
    "get_surgery",
    "knobs_of",
    "linear_cka",
    "online",
    "project",
    "repair",
    "representation",
    "routing_accuracy",
]
