"""Architecture search: of an attention block (``sase``)."""
