# The public names. `__init__.py` reads this file, and imports a name when it is first used.

from .data.readers import reader as reader
from .errors import InputError as InputError
from .errors import PatchscopeError as PatchscopeError
from .errors import RunError as RunError
from .fitting import fit as fit
from .mappings import Affine as Affine
from .mappings import Fitted as Fitted
from .mappings import Provenance as Provenance
from .mappings import Space as Space
from .metrics import column as column
from .metrics import metric as metric
from .models import Model as Model
from .plan import Optimisations as Optimisations
from .proof import load as load
from .readouts import Choices as Choices
from .readouts import Generate as Generate
from .readouts import Hidden as Hidden
from .readouts import NextToken as NextToken
from .recipe import Recipe as Recipe
from .recipe import load_recipe as load_recipe
from .runs.experiments import Experiment as Experiment
from .runs.explain import explain as explain
from .runs.merge import merge as merge
from .runs.results import Run as Run
from .runs.results import load_run as load_run
from .runs.run import run as run
from .spec import Patchscope as Patchscope
from .spec import Readout as Readout
from .spec import Site as Site
from .spec import Source as Source
from .spec import Target as Target
from .spec import prompts as prompts
from .spec import register_readout as register_readout
from .spec import register_site as register_site
from .spec.mapping import mapping as mapping
from .spec.positions import Each as Each
from .spec.positions import Span as Span

__version__: str
