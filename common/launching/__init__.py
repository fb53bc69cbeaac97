"""How processes become ranks: what the launcher says, network variables, equal starts, ranks that are lost."""
