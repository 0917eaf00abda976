import torch
from relvit.patches import resample_matrix, resample, _rand
class PatchAugment:
    def __init__(self, p, **kw): self.p=p
    def __call__(self, x, generator=None): return x.float()/255 if not x.is_floating_point() else x
def random_flip(x, prob=.5, generator=None):
    return torch.where(_rand(len(x),1,1,1,generator=generator,device=x.device)<prob, x.flip(-1), x)
def random_shift(x, pad, generator=None):
    b,_,H,W=x.shape
    s=(_rand(2,b,generator=generator,device=x.device)*(2*pad+1)).floor()-pad
    return resample(x, resample_matrix(s[0],torch.full((b,),H,device=x.device),H,H), resample_matrix(s[1],torch.full((b,),W,device=x.device),W,W))
def random_resized_crop(x, size=None, scale=(.08,1.), ratio=(3/4,4/3), generator=None):
    b,_,H,W=x.shape; size=size or H
    z=torch.zeros(b,device=x.device)
    return resample(x, resample_matrix(z,z+H,size,H), resample_matrix(z,z+W,size,W))
