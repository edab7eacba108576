"""Representation Surgery: small modules that bring a merged model's features back to those of its experts."""

from suture.surgery.blended_model import BlendModel
from suture.surgery.model import SurgeryModel, TaskModel
from suture.surgery.modules import FINAL, SurgeryModules
from suture.surgery.network import Block, find_blocks
from suture.surgery.online import OnlineResult, online
from suture.surgery.problem import ForwardPasses, Problem
from suture.surgery.repair import SURGERIES, get_surgery, knobs_of, repair
from suture.surgery.representation import Distances, Representation, linear_cka, project, representation
from suture.surgery.results import SurgeryResult
from suture.surgery.router import CentroidRouter, LinearRouter, fit_router, routing_accuracy
from suture.surgery.wrapper import SurgeryModelWrapper

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
    "SurgeryModelWrapper",
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
