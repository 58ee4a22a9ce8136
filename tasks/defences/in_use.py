"""The defence that studies use. Safe LoRA is currently the only one."""

from ebbline.tasks.defences.defence import Defence
from ebbline.tasks.defences.safe_lora import SAFE_LORA

DEFENCE: Defence = SAFE_LORA
