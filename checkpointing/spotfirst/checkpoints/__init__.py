"""Checkpoints: who may write them, what they consist of, and how they come and go.

===================== ===========================================================================
module                what it is about
===================== ===========================================================================
``chain``             claims, commits, releases: at most one attempt can commit
``claiming``          how a new attempt gets the chain from the one before
``statetree``         a training state as a JSON tree and a list of arrays
``manifest``          what a checkpoint consists of
``saving``            from a snapshot to a commit
``period``            how often to checkpoint; ``pace`` measures what it follows from
``schedule``          when the next one is due
``last``              what can still be stored when there is little time left
``ranks``             one checkpoint of several ranks: each writes its part, the first merges
``restoring``         which checkpoint a run goes on from
``files``             checkpoints of scripts that only write files
===================== ===========================================================================
"""
