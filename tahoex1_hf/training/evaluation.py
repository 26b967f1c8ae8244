from pydantic import BaseModel
class CellTypeConfig(BaseModel): pass
class GeneEssentialityConfig(BaseModel): pass
CellTypeEvaluation=GeneEssentialityEvaluation=object
