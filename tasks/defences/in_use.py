"""The defence that studies use. Safe LoRA is the only one so far."""

from ebbline.tasks.defences.defence import Defence
from ebbline.tasks.defences.gate import SAFE_LORA

DEFENCE: Defence = SAFE_LORA
