"""A stage's tensors and its status lie in one piece of memory, without gaps, and come out as they went in."""

import torch

from lightning_comm.transport.cyclic.messages import STATUS_BYTES, STATUS_NUMBERS, StageLayout, StageMessage


def tensors():
    generator = torch.Generator().manual_seed(0)
    kinds = [(3, torch.bfloat16), (2, torch.float64), (5, torch.float32), (0, torch.float32), (1, torch.float64)]
    return [torch.randn(2, size, generator=generator).to(dtype) for size, dtype in kinds]


def test_parts_keep_their_order_shapes_and_types_and_fill_the_message():
    layout = StageLayout(tensors())
    message = StageMessage(layout, torch.device("cpu"))
    assert layout.payload_bytes == sum(each.nbytes for each in tensors())
    assert message.memory.nbytes == layout.message_bytes == STATUS_BYTES + layout.payload_bytes
    assert message.status.shape == (STATUS_NUMBERS,)
    message.status.fill_(7)
    for part, tensor in zip(message.parts, tensors(), strict=True):
        assert (part.shape, part.dtype) == (tensor.shape, tensor.dtype)
        part.copy_(tensor)
    other = StageMessage(layout, torch.device("cpu"))
    other.memory.copy_(message.memory)  # what the wire does
    assert all(torch.equal(part, tensor) for part, tensor in zip(other.parts, tensors(), strict=True))
    assert other.status.tolist() == [7] * STATUS_NUMBERS


def test_a_message_waits_once_for_what_it_was_sent_with():
    class Work:
        waited = 0

        def wait(self):
            self.waited += 1

    message, work = StageMessage(StageLayout(tensors()), torch.device("cpu")), Work()
    message.sent()
    message.sending = work
    message.sent()
    message.sent()
    assert work.waited == 1
