from . import methods as methods
from .errors import EvopruneError as EvopruneError
from .errors import ModelError as ModelError
from .errors import OutOfMemory as OutOfMemory
from .errors import UsageError as UsageError
from .errors import VideoError as VideoError
from .hf import Columns as Columns
from .hf import EvoPrune as EvoPrune
from .hf import PrunedModel as PrunedModel
from .hf import apply as apply
from .hf import encode as encode
from .hf import processor_inputs as processor_inputs
from .hf import remove as remove
from .live import VideoStream as VideoStream
from .moments import Moment as Moment
from .report import Report as Report
from .session import Answer as Answer
from .session import Cache as Cache
from .session import Chat as Chat
from .session import EncodedInputs as EncodedInputs
from .session import read_ahead as read_ahead
from .video import read_frames as read_frames
from .video_qa import VideoQA as VideoQA
from .vision import Encoded as Encoded

__version__: str
