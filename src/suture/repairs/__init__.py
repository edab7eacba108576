"""Representation Surgery: small modules that bring a merged model's features back to its experts'."""

from suture.repairs.affine_maps import AffineMaps, fold_into_heads, unfoldable
from suture.repairs.blended_model import BlendModel
from suture.repairs.comparison import Distances, Representation, linear_cka, project, representation
from suture.repairs.entry import add_router, repair
from suture.repairs.masked_model import MaskedModel
from suture.repairs.model import SurgeryModel, TaskModel
from suture.repairs.modules import SurgeryModules
from suture.repairs.network import FINAL, Block, find_blocks
from suture.repairs.problem import ForwardPasses, Problem
from suture.repairs.registry import RepairKind, get_repair_kind, repair_kind, repair_kinds
from suture.repairs.results import RepairResult, Stream
from suture.repairs.router import CentroidRouter, LinearRouter, fit_router, routing_accuracy
from suture.repairs.static_model import StaticModel

__all__ = [
    "FINAL",
    "AffineMaps",
    "BlendModel",
    "Block",
    "CentroidRouter",
    "Distances",
    "ForwardPasses",
    "LinearRouter",
    "MaskedModel",
    "Problem",
    "RepairKind",
    "RepairResult",
    "Representation",
    "StaticModel",
    "Stream",
    "SurgeryModel",
    "SurgeryModules",
    "TaskModel",
    "add_router",
    "find_blocks",
    "fit_router",
    "fold_into_heads",
    "get_repair_kind",
    "linear_cka",
    "project",
    "repair",
    "repair_kind",
    "repair_kinds",
    "representation",
    "routing_accuracy",
    "unfoldable",
]
