from .ask import notes_about as notes_about
from .cli_docs import reference as reference
from .prompt import why_single_questions as why_single_questions
from .running import load as load
from .running import prepare as prepare
from .terminal import progress as progress
from .terminal import tell as tell
