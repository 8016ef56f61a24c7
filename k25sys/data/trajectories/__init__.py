"""Zero-vision SFT: text-only conversations in which every operation on a picture is a program. Source: spec section 4.

Problems are drawn by Pillow (`k25sys[media]`), their programs run in a sandbox, and a conversation is kept only if it
ends in the exact answer. The recipe of the paper is not disclosed beyond this; loss on the assistant's tokens only is
our choice.
"""

from k25sys.data.trajectories.generate import make_conversation, make_conversations, write_conversations
from k25sys.data.trajectories.sandbox import CellResult, PythonSandbox
from k25sys.data.trajectories.source import ConversationSource, generated_conversations
from k25sys.data.trajectories.tasks import TASK_KINDS, make_task

__all__ = [
    "TASK_KINDS",
    "CellResult",
    "ConversationSource",
    "PythonSandbox",
    "generated_conversations",
    "make_conversation",
    "make_conversations",
    "make_task",
    "write_conversations",
]
