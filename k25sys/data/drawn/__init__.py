"""Generated pictures with exact answers: shapes, counting, writing and charts. Needs Pillow (`k25sys[media]`)."""

from k25sys.data.drawn.scene import Mark, Truth
from k25sys.data.drawn.source import DRAWN_KINDS, DrawnPictures

__all__ = ["DRAWN_KINDS", "DrawnPictures", "Mark", "Truth"]
