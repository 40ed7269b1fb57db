"""How the layout of the state database came to be: one script per change, applied in order by Alembic."""
