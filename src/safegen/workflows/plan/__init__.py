"""Plans: what a job will do, how long it takes and how much memory, from a short probe."""

from safegen.workflows.plan.attack import plan_attack
from safegen.workflows.plan.edit import plan_edit
from safegen.workflows.plan.evaluation import plan_evaluation
from safegen.workflows.plan.plan import Plan

__all__ = ["Plan", "plan_attack", "plan_edit", "plan_evaluation"]
