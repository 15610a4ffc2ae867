"""To the Hub and back: models with their card, data sets with boxes or masks, Spaces."""

from sim_hf.hub.card_check import CardError, check_model_card
from sim_hf.hub.dataset import coco_dataset, push_dataset
from sim_hf.hub.errors import HubError
from sim_hf.hub.model import push_model
from sim_hf.hub.model_card import write_model_card
from sim_hf.hub.run_facts import RunFacts, facts_of_run
from sim_hf.hub.space import push_space

__all__ = [
    "CardError",
    "HubError",
    "RunFacts",
    "check_model_card",
    "coco_dataset",
    "facts_of_run",
    "push_dataset",
    "push_model",
    "push_space",
    "write_model_card",
]
