"""The papers' released checkpoints as ordinary ones, and back: `python -m rlaifv.convert SOURCE OUT`.

`layouts` finds out what a release is; `llava` and `omnilmm` write it anew, with `tokens`, `adapters` and `weights`;
`reward` makes LLaVA-RLHF's reward model one of ours; `original` is the way back.
"""
