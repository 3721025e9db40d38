"""Other formats: :func:`export` writes episodes of a store to a file, :func:`import_` reads them from files.

| format | written | read | tokens |
|---|---|---|---|
| ``atif`` | yes | yes | all, in ``extra["agentsdpo"]`` |
| ``verifiers`` | yes | yes | all, in ``info["agentsdpo"]`` |
| ``parquet`` | yes | yes | all |
| ``openai``, ``hf`` | yes | yes | none |
| ``pairs``, ``sts`` | yes | no | none |
| ``archipelago`` | by ``bench export`` | yes | none |
"""

from agentsdpo.replay.formats.exporting import EXPORTS, export
from agentsdpo.replay.formats.importing import IMPORTS, import_
from agentsdpo.replay.formats.report import ExportReport, ImportReport, Progress

__all__ = ["EXPORTS", "IMPORTS", "ExportReport", "ImportReport", "Progress", "export", "import_"]
