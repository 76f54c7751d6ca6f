"""The front door: one command, `specstop`, over `mdp`, `simulate` and `realmodels`.

`cli` reads the command line and owns exit codes; `verbs` does what each verb says; `inputs` checks what was typed
before any work starts; `output` writes JSON lines and tables; `settings` prepares the process.
"""
