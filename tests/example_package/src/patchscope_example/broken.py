"""A module that cannot be imported, as an installed package's may be."""

import a_module_that_is_not_there  # noqa: F401
