"""From weights to a served artefact, the bundle; and the runtimes that execute one."""
