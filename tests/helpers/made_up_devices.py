"""Two accelerators on a machine that has none: tensors carry the name of a made-up device, and an operation that mixes
two of them is refused, as CUDA would."""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from rlaifv.vlm.loading import VLM

CPU, FIRST, SECOND = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)
MOVES = {torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.type_as}
INDEXING = {torch.Tensor.__getitem__, torch.Tensor.__setitem__}


def where(tensor: torch.Tensor) -> torch.device:
    return getattr(tensor, "made_up_device", CPU)


class MadeUpDevices(TorchFunctionMode):
    """What is computed from a tensor stays on its device, and says so when asked for it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func == torch.Tensor.device.__get__:
            return where(args[0])
        if func in (torch.device, torch.Tensor.__deepcopy__):
            return func(*args)  # a tensor's copy carries the name too
        leaves = tree_leaves((args, kwargs or {}))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        named = [torch.device(x) for x in [*leaves, (kwargs or {}).get("device")] if is_device(x)]
        # numbers and indices may come from the CPU
        places = {where(t) for t in tensors if t.dim() or where(t) != CPU}
        if func in INDEXING and where(tensors[0]) != CPU:
            places.discard(CPU)
        if func in MOVES:
            named += [where(t) for t in tensors[1:]] or [CPU if func is torch.Tensor.cpu else where(tensors[0])]
        elif len(places) > 1 and func is not torch.Tensor.copy_:
            raise RuntimeError(f"{func.__name__}: tensors on {' and '.join(sorted(map(str, places)))}")
        place = named[0] if named else where(tensors[0]) if func is torch.Tensor.copy_ else next(iter(places), CPU)

        def placed(x):
            if isinstance(x, torch.Tensor) and where(x) != place:
                x = x.view_as(x) if any(x is t for t in tensors) else x
                x.made_up_device = place
            return x

        real = tree_map(lambda x: CPU if is_device(x) else x, (args, kwargs or {}))
        return tree_map(placed, func(*real[0], **real[1]))


def is_device(x: object) -> bool:
    return isinstance(x, torch.device) or (isinstance(x, str) and x.split(":")[0] in ("cpu", "cuda"))


def spread(vlm: VLM) -> None:
    """The first decoder layer and what comes before it on one device, the rest on another, and whatever a block is
    given goes to the block's device first, as accelerate's `dispatch_model` has it."""
    network, decoder, head = vlm.network, vlm.network.get_decoder(), vlm.network.get_output_embeddings()
    tied = head.weight is network.get_input_embeddings().weight
    late = [*decoder.layers[1:], decoder.norm, decoder.rotary_emb, *([] if tied else [head])]
    second = {module for block in late for module in block.modules()}

    def onto(device: torch.device):
        return lambda tree: tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, tree)

    for module in network.modules():
        device = SECOND if module in second else FIRST
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            tensor.made_up_device = device
        # functions in a module's clothes hold no tensors, and models share them
        holds = [*module.parameters(), *module.buffers()]
        if holds and module not in (network, network.base_model, decoder):
            move = onto(device)
            module.register_forward_pre_hook(lambda _m, a, k, move=move: (move(a), move(k)), with_kwargs=True)
    network.register_forward_hook(lambda _m, _a, output: onto(FIRST)(output))
