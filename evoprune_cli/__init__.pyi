from .cli_docs import reference as reference
from .running import load as load
from .running import prepare as prepare
from .terminal import progress as progress
from .terminal import tell as tell
