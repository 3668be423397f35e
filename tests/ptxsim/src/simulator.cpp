// ptxemu: small functional PTX interpreter (warp-vectorised, all resident CTAs interleaved). g++ -std=c++20 -O3 -march=native
#include <cstdint>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cmath>
#include <string>
#include <vector>
#include <map>
#include <unordered_map>
#include <set>
#include <deque>
#include <memory>
#include <functional>
#include <stdexcept>
#include <algorithm>
#include <immintrin.h>
using std::string; using std::vector; typedef uint8_t u8; typedef uint16_t u16; typedef uint32_t u32; typedef uint64_t u64; typedef int8_t s8; typedef int16_t s16; typedef int32_t s32; typedef int64_t s64; typedef unsigned __int128 u128;
static const u64 SHW=0x0100000000000000ull, LOW=0x0200000000000000ull, PAW=0x0300000000000000ull, FNW=0x0F00000000000000ull; static const u64 WINM=0xFF00000000000000ull;
struct Err:std::runtime_error{using runtime_error::runtime_error;};
[[noreturn]] static void die(const char*f,...){char b[2048];va_list a;va_start(a,f);vsnprintf(b,sizeof b,f,a);va_end(a);throw Err(b);}
// ---- 16-bit floats
static float odd(double d){ float f=(float)d; u32 u=__builtin_bit_cast(u32,f); if(f==f && !std::isinf(f) && (double)f!=d){ if(std::fabs((double)f)>std::fabs(d)) u--; u|=1; f=__builtin_bit_cast(float,u);} return f;}
struct f16{u16 b; operator float()const{return _cvtsh_ss(b);} f16(){} f16(float f){b=_cvtss_sh(f,0);} f16(double f){b=_cvtss_sh(odd(f),0);} };
struct bf16{u16 b; operator float()const{return __builtin_bit_cast(float,(u32)b<<16);} bf16(){} static u16 rn(float f){u32 u=__builtin_bit_cast(u32,f); if((u&0x7fffffff)>0x7f800000) return 0x7fff; return (u+0x7fff+((u>>16)&1))>>16;} bf16(float f){b=rn(f);} bf16(double d){ float f=(float)d; // round to odd into f first
   u32 u=__builtin_bit_cast(u32,f); if(f==f && !std::isinf(f) && (double)f!=d){ if((std::fabs((double)f)>std::fabs(d))) u--; u|=1; f=__builtin_bit_cast(float,u);} b=rn(f);} };
enum Ty:u8{T0,U8,U16,U32,U64,S8,S16,S32,S64,B8,B16,B32,B64,B128,F16,BF16,F16X2,BF16X2,F32,F64,PRED,TF32,E4M3,E5M2,E4M3X2,E5M2X2};
static int tsz(Ty t){switch(t){case U8:case S8:case B8:case PRED:case E4M3:case E5M2:return 1;case U16:case S16:case B16:case F16:case BF16:case E4M3X2:case E5M2X2:return 2;case U64:case S64:case B64:case F64:return 8;case B128:return 16;default:return 4;}}
static const std::unordered_map<string,Ty> TYN={{"u8",U8},{"u16",U16},{"u32",U32},{"u64",U64},{"s8",S8},{"s16",S16},{"s32",S32},{"s64",S64},{"b8",B8},{"b16",B16},{"b32",B32},{"b64",B64},{"b128",B128},{"f16",F16},{"bf16",BF16},{"f16x2",F16X2},{"bf16x2",BF16X2},{"f32",F32},{"f64",F64},{"pred",PRED},{"tf32",TF32},{"e4m3",E4M3},{"e5m2",E5M2},{"e4m3x2",E4M3X2},{"e5m2x2",E5M2X2}};
static bool sgn(Ty t){return t==S8||t==S16||t==S32||t==S64;}
enum Sp:u8{GEN,GLOBAL,SHARED,LOCAL,PARAM,CONST};
enum OK:u8{O_NONE,O_REG,O_IMM,O_SREG,O_VEC,O_MEM,O_LABEL,O_FUNC,O_SINK,O_LIST};
enum SR:u8{TIDX,TIDY,TIDZ,NTIDX,NTIDY,NTIDZ,CTAX,CTAY,CTAZ,NCTAX,NCTAY,NCTAZ,LANE,WARPID,NWARP,SMID,NSMID,GRIDID,CLK,CLK64,GTIMER,LMEQ,LMLE,LMLT,LMGE,LMGT,DSMEM,TSMEM,ENV1,ENV2,ENVZ,CLZERO,CLONE};
struct Opd{OK k=O_NONE; bool neg=false; u8 w=0; Ty ty=T0; Sp sp=GEN; u8 sr=0; u32 off=0; u64 imm=0; bool hasbase=false; bool kparam=false; int lab=-1; string name; vector<Opd> v;};
struct Warp; struct Ins; typedef void(*Fn)(Warp&,const Ins&,u32);
enum Ct:u8{C_NONE,C_BRA,C_EXIT,C_RET,C_CALL,C_BAR,C_SYNC,C_YIELD,C_BRX,C_TRAP,C_WSYNC};
struct Ins{Fn fn=nullptr; Ct ct=C_NONE; int pr=-1; bool pn=false; Ty t=T0,t2=T0; Sp sp=GEN; u8 nv=1; u8 a=0,b=0,c=0,d=0; bool ftz=false,sat=false,spin=false,mmask=false; u8 rnd=0; u8 ck=0; int mop=-1; vector<Opd> o; vector<string> q; string op; int line=0; int tgt=-1; vector<int> tg; 
 bool has(const char*s)const{for(auto&x:q)if(x==s)return true;return false;} };
struct Sym{Sp sp; u64 addr; u64 size; Ty ty; bool fparam=false; bool isreg=false; bool ext=false; int align=1;};
struct Func{string name; bool entry=false; int start=-1,end=-1; vector<std::pair<string,Sym>> params, rets; u32 kpsize=0; u32 shsize=0; bool defined=false; u32 extoff=0; int reqn[3]={0,0,0};};
struct Module{vector<Ins> code; vector<Func> fns; std::unordered_map<string,int> fidx; std::unordered_map<string,Sym> g; vector<std::pair<u8*,size_t>> mem; u32 rfsize=0, locsize=0, parsize=0, modshared=0; string src; vector<string> lines; ~Module(){for(auto&m:mem)free(m.first);} };
struct Alloc{u64 lo,hi;};
struct Dev{std::map<u64,u64> al; bool check=true; u64 clo=1,chi=0; u64 ninstr=0; u64 seed=0; int maxcta=264; u64 limit=0; bool defer=true; u64 ws[4]={0,0,0,0}; u64 clock=0; string err; bool trace=false;} dev;
struct Frag{u32 mask; int pc; u8 wait; int bar;}; // wait:0 run,1 warp-sync,2 barrier
struct Ret{int pc; int ci;};
struct CpA{u64 dst,src; u32 n,sn;};
struct Cta; struct Grid;
struct Warp{u8*rf; Cta*cta; int wid; u32 live; vector<Frag> fr; int cur=0; vector<u8> loc; vector<u8> par; vector<vector<Ret>> st; vector<CpA> pend[32]; std::deque<vector<CpA>> grp[32]; u32 barred=0; bool yielded=false; int lastback=0; Grid*g; u32 curmask; int curpc; u32 nt; u64 rng; u32 carry=0;};
struct Bar{u32 arrived=0; u32 expect=0; u32 acc_or=0,acc_and=1,acc_pop=0;};
struct Cta{u32 x,y,z; vector<Warp> w; vector<u8> sh; Bar bar[16]; u32 live; bool done=false; u64 id;};
struct Grid{Module*m; Func*f; u32 gd[3],bd[3]; u32 shb; vector<u8> kp; vector<u64> ws; u64 envp; u32 nthr;};

// ---------- operand access
static u64 srval(Warp&w,int sr,int l){Grid&g=*w.g; u32 t=w.wid*32+l; switch(sr){case TIDX:return t%g.bd[0];case TIDY:return t/g.bd[0]%g.bd[1];case TIDZ:return t/(g.bd[0]*g.bd[1]);case NTIDX:return g.bd[0];case NTIDY:return g.bd[1];case NTIDZ:return g.bd[2];case CTAX:return w.cta->x;case CTAY:return w.cta->y;case CTAZ:return w.cta->z;case NCTAX:return g.gd[0];case NCTAY:return g.gd[1];case NCTAZ:return g.gd[2];case LANE:return l;case WARPID:return w.wid;case NWARP:return 64;case SMID:return w.cta->id%132;case NSMID:return 132;case CLK:return (u32)dev.ninstr;case CLK64:case GTIMER:return dev.ninstr;case LMEQ:return 1u<<l;case LMLT:return (1u<<l)-1;case LMLE:return (2u<<l)-1;case LMGE:return ~((1u<<l)-1);case LMGT:return ~((2u<<l)-1);case DSMEM:return g.shb;case TSMEM:return w.cta->sh.size();case ENV1:return g.envp>>32;case ENV2:return g.envp&0xffffffffu;case CLONE:return 1;default:return 0;}}
template<class U,class W> __attribute__((noinline,optimize("no-tree-vectorize","no-tree-slp-vectorize"))) static void cvw(U*t,const W*p){for(int i=0;i<32;i++)t[i]=(U)p[i];}
template<class T> static inline const T* src(Warp&w,const Opd&o,T*tmp){
  typedef typename std::conditional<sizeof(T)==1,u8,typename std::conditional<sizeof(T)==2,u16,typename std::conditional<sizeof(T)==4,u32,u64>::type>::type>::type U0;
  if(o.k==O_REG){ u8*p=w.rf+o.off; if(o.w==sizeof(T)) return (const T*)p; U0*t=(U0*)tmp; switch(o.w){case 1:cvw(t,(u8*)p);break;case 2:cvw(t,(u16*)p);break;case 4:cvw(t,(u32*)p);break;case 8:cvw(t,(u64*)p);break;default:die("width");} return tmp; }
  typedef typename std::conditional<sizeof(T)==1,u8,typename std::conditional<sizeof(T)==2,u16,typename std::conditional<sizeof(T)==4,u32,u64>::type>::type>::type U;
  if(o.k==O_IMM){ T x=__builtin_bit_cast(T,(U)o.imm); for(int i=0;i<32;i++)tmp[i]=x; return tmp;}
  if(o.k==O_SREG){ for(int i=0;i<32;i++)tmp[i]=__builtin_bit_cast(T,(U)srval(w,o.sr,i)); return tmp;}
  die("bad source operand kind %d (%s) line %d",o.k,o.name.c_str(),w.g->m->code[w.curpc].line);
}
template<class D,class T> static inline void put(D*d,const T*r,u32 m){ if(m==0xffffffffu){for(int i=0;i<32;i++)d[i]=(D)r[i];} else for(int i=0;i<32;i++) d[i]=(m>>i&1)?(D)r[i]:d[i]; }
template<class T> static inline void dst(Warp&w,const Opd&o,u32 m,const T*r,bool sx=false){ if(o.k==O_SINK)return; if(o.k!=O_REG) die("dst not a register"); u8*p=w.rf+o.off;
  typedef typename std::conditional<sizeof(T)==1,u8,typename std::conditional<sizeof(T)==2,u16,typename std::conditional<sizeof(T)==4,u32,u64>::type>::type>::type U; typedef typename std::make_signed<U>::type S;
  const U*u=(const U*)r; const S*s=(const S*)r;
  if(o.w==sizeof(T)) put((U*)p,u,m); else if(o.w>sizeof(T)){ if(sx){ if(o.w==2)put((s16*)p,s,m); else if(o.w==4)put((s32*)p,s,m); else put((s64*)p,s,m);} else { if(o.w==2)put((u16*)p,u,m); else if(o.w==4)put((u32*)p,u,m); else put((u64*)p,u,m);} }
  else { if(o.w==1)put((u8*)p,u,m); else if(o.w==2)put((u16*)p,u,m); else put((u32*)p,u,m);} }
static u32 predmask(Warp&w,const Opd&o){u8 t[32];const u8*p=src<u8>(w,o,t);u32 m=0;for(int i=0;i<32;i++)m|=(u32)(p[i]&1)<<i;return o.neg?~m:m;}
static inline void fz(float*x){for(int i=0;i<32;i++){u32 u=__builtin_bit_cast(u32,x[i]); if(!(u&0x7f800000))x[i]=__builtin_bit_cast(float,u&0x80000000);}}
template<class T> static inline const T* srcf(Warp&w,const Ins&I,const Opd&o,T*tmp){ const T*p=src<T>(w,o,tmp); if constexpr(std::is_same<T,float>::value){ if(I.ftz){ if(p!=tmp)memcpy(tmp,p,sizeof(T)*32); fz((float*)tmp); return tmp;} } return p;}
template<class T> static inline void dstf(Warp&w,const Ins&I,const Opd&o,u32 m,T*r){ if constexpr(std::is_same<T,float>::value){ if(I.ftz)fz((float*)r); if(I.sat)for(int i=0;i<32;i++){float x=((float*)r)[i];((float*)r)[i]=x>0?(x<1?x:1.f):0.f;} } else if constexpr(std::is_same<T,double>::value){ if(I.sat)for(int i=0;i<32;i++){double x=r[i];r[i]=x>0?(x<1?x:1.):0.;} } else if constexpr(std::is_same<T,f16>::value||std::is_same<T,bf16>::value){ if(I.sat)for(int i=0;i<32;i++){float x=r[i];r[i]=T(x>0?(x<1?x:1.f):0.f);} } dst<T>(w,o,m,r);}
template<class T,class F> static void un(Warp&w,const Ins&I,u32 m){F f;T t[32],r[32];auto a=srcf<T>(w,I,I.o[1],t);for(int i=0;i<32;i++)r[i]=f(a[i]);dstf<T>(w,I,I.o[0],m,r);}
template<class T,class F> static void bi(Warp&w,const Ins&I,u32 m){F f;T t[32],t1[32],r[32];auto a=srcf<T>(w,I,I.o[1],t);auto b=srcf<T>(w,I,I.o[2],t1);for(int i=0;i<32;i++)r[i]=f(a[i],b[i]);dstf<T>(w,I,I.o[0],m,r);}
template<class T,class F> static void tri(Warp&w,const Ins&I,u32 m){F f;T t[32],t1[32],t2[32],r[32];auto a=srcf<T>(w,I,I.o[1],t);auto b=srcf<T>(w,I,I.o[2],t1);auto c=srcf<T>(w,I,I.o[3],t2);for(int i=0;i<32;i++)r[i]=f(a[i],b[i],c[i]);dstf<T>(w,I,I.o[0],m,r);}
// packed x2: view as u32 lanes, apply on halves
template<class H,class F> static void bi2(Warp&w,const Ins&I,u32 m){F f;u32 t[32],t1[32],r[32];auto a=src<u32>(w,I.o[1],t);auto b=src<u32>(w,I.o[2],t1);for(int i=0;i<32;i++){H x,y,z,q;x.b=a[i];y.b=a[i]>>16;z.b=b[i];q.b=b[i]>>16;H p=f(x,z),s=f(y,q);r[i]=p.b|(u32)s.b<<16;}dst<u32>(w,I.o[0],m,r);}
template<class H,class F> static void tri2(Warp&w,const Ins&I,u32 m){F f;u32 t[32],t1[32],t2[32],r[32];auto a=src<u32>(w,I.o[1],t);auto b=src<u32>(w,I.o[2],t1);auto c=src<u32>(w,I.o[3],t2);for(int i=0;i<32;i++){H x,y,z,q,u,v;x.b=a[i];y.b=a[i]>>16;z.b=b[i];q.b=b[i]>>16;u.b=c[i];v.b=c[i]>>16;H p=f(x,z,u),s=f(y,q,v);r[i]=p.b|(u32)s.b<<16;}dst<u32>(w,I.o[0],m,r);}
template<class H,class F> static void un2(Warp&w,const Ins&I,u32 m){F f;u32 t[32],r[32];auto a=src<u32>(w,I.o[1],t);for(int i=0;i<32;i++){H x,y;x.b=a[i];y.b=a[i]>>16;H p=f(x),s=f(y);r[i]=p.b|(u32)s.b<<16;}dst<u32>(w,I.o[0],m,r);}
template<class F> static Fn pInt(Ty t,int ar,F){switch(t){
#define C1(X,Y) case X: return ar==1?(Fn)&un<Y,decltype([](Y a){if constexpr(std::is_invocable<F,Y>::value)return (Y)F{}(a);else return a;})>:ar==2?(Fn)&bi<Y,decltype([](Y a,Y b){if constexpr(std::is_invocable<F,Y,Y>::value)return (Y)F{}(a,b);else return a;})>:(Fn)&tri<Y,decltype([](Y a,Y b,Y c){if constexpr(std::is_invocable<F,Y,Y,Y>::value)return (Y)F{}(a,b,c);else return a;})>;
 C1(U8,u8) C1(B8,u8) C1(PRED,u8) C1(U16,u16) C1(B16,u16) C1(U32,u32) C1(B32,u32) C1(U64,u64) C1(B64,u64) C1(S8,s8) C1(S16,s16) C1(S32,s32) C1(S64,s64)
 default:return nullptr;}}
template<class F> static Fn pFlt(Ty t,int ar,F){ switch(t){
 C1(F32,float) C1(F64,double) C1(F16,f16) C1(BF16,bf16)
 case F16X2:return ar==1?(Fn)&un2<f16,decltype([](f16 a){if constexpr(std::is_invocable<F,f16>::value)return (f16)F{}(a);else return a;})>:ar==2?(Fn)&bi2<f16,decltype([](f16 a,f16 b){if constexpr(std::is_invocable<F,f16,f16>::value)return (f16)F{}(a,b);else return a;})>:(Fn)&tri2<f16,decltype([](f16 a,f16 b,f16 c){if constexpr(std::is_invocable<F,f16,f16,f16>::value)return (f16)F{}(a,b,c);else return a;})>;
 case BF16X2:return ar==1?(Fn)&un2<bf16,decltype([](bf16 a){if constexpr(std::is_invocable<F,bf16>::value)return (bf16)F{}(a);else return a;})>:ar==2?(Fn)&bi2<bf16,decltype([](bf16 a,bf16 b){if constexpr(std::is_invocable<F,bf16,bf16>::value)return (bf16)F{}(a,b);else return a;})>:(Fn)&tri2<bf16,decltype([](bf16 a,bf16 b,bf16 c){if constexpr(std::is_invocable<F,bf16,bf16,bf16>::value)return (bf16)F{}(a,b,c);else return a;})>;
 default:return nullptr;}}
// ---------- memory
static void checkRange(Warp&w,u64 a,u32 n,const char*what){ if(!dev.check)return; if(a>=dev.clo&&a+n<=dev.chi)return; auto it=dev.al.upper_bound(a); if(it!=dev.al.begin()){--it; if(a>=it->first&&a+n<=it->second){dev.clo=it->first;dev.chi=it->second;return;}} die("%s of %u bytes at 0x%llx is outside every allocation",what,n,(unsigned long long)a);}
static inline u8* ptr(Warp&w,Sp sp,u64 a,u32 n,int lane,const char*what){
  if(n>1&&(a&(n-1))&&n<=16) die("misaligned %s of %u bytes at 0x%llx (space %d)",what,n,(unsigned long long)a,sp);
  if(sp==GEN){u64 h=a&WINM; if(h==SHW){sp=SHARED;a&=~WINM;} else if(h==LOW){sp=LOCAL;a&=~WINM;} else if(h==PAW){sp=PARAM;a&=~WINM;} else sp=GLOBAL;}
  switch(sp){case SHARED: a&=0xffffffffull; if(a+n>w.cta->sh.size()) die("%s of %u bytes at shared offset 0x%llx, CTA has %zu",what,n,(unsigned long long)a,w.cta->sh.size()); return &w.cta->sh[a];
   case LOCAL: if(a+n>w.g->m->locsize) die("%s at local offset 0x%llx out of %u",what,(unsigned long long)a,w.g->m->locsize); return &w.loc[(size_t)lane*w.g->m->locsize+a];
   case PARAM: if(a+n>w.g->kp.size()) die("%s at kernel param offset %llu of %zu",what,(unsigned long long)a,w.g->kp.size()); return &w.g->kp[a];
   default: checkRange(w,a,n,what); return (u8*)a;}
}
struct AB{u64 a[32];};
static inline void addr(Warp&w,const Opd&o,AB&r){ if(!o.hasbase){for(int i=0;i<32;i++)r.a[i]=o.imm;return;} const u8*p=w.rf+o.off; if(o.w==8){const u64*q=(const u64*)p;for(int i=0;i<32;i++)r.a[i]=q[i]+o.imm;} else {const u32*q=(const u32*)p;for(int i=0;i<32;i++)r.a[i]=(u32)(q[i]+(u32)o.imm);} }
static u8* fpar(Warp&w,int l,u64 off){return &w.par[(size_t)l*w.g->m->parsize+off];}
template<class T> static void ld(Warp&w,const Ins&I,u32 m){ AB A; const Opd&mo=I.o[1]; addr(w,mo,A); int nv=I.nv; T r[8][32]; u32 n=sizeof(T)*nv;
  bool fp=mo.sp==PARAM&&!mo.kparam&&I.sp==PARAM&&!mo.hasbase&&mo.lab==1;
  for(u32 mm=m;mm;mm&=mm-1){int i=__builtin_ctz(mm); u8*p=fp?fpar(w,i,A.a[i]):ptr(w,I.sp,A.a[i],n,i,"load"); for(int k=0;k<nv;k++)memcpy(&r[k][i],p+k*sizeof(T),sizeof(T));}
  if(nv==1&&I.o[0].k!=O_VEC)dst<T>(w,I.o[0],m,r[0],sgn(I.t)); else for(int k=0;k<nv;k++)dst<T>(w,I.o[0].v[k],m,r[k],sgn(I.t)); }
template<class T> static void st(Warp&w,const Ins&I,u32 m){ AB A; const Opd&mo=I.o[0]; addr(w,mo,A); int nv=I.nv; T t[8][32]; const T*s[8]; u32 n=sizeof(T)*nv; if(I.o[1].k!=O_VEC)s[0]=src<T>(w,I.o[1],t[0]); else for(int k=0;k<nv;k++)s[k]=src<T>(w,I.o[1].v[k],t[k]);
  bool fp=I.sp==PARAM;
  for(u32 mm=m;mm;mm&=mm-1){int i=__builtin_ctz(mm); u8*p=fp?fpar(w,i,A.a[i]):ptr(w,I.sp,A.a[i],n,i,"store"); for(int k=0;k<nv;k++)memcpy(p+k*sizeof(T),&s[k][i],sizeof(T));} }
// ---------- mov / pack
static void mov(Warp&w,const Ins&I,u32 m){ const Opd&d=I.o[0],&s=I.o[1]; int n=tsz(I.t);
  if(d.k!=O_VEC&&s.k!=O_VEC){ switch(n){case 1:{u8 t[32];dst<u8>(w,d,m,src<u8>(w,s,t));break;}case 2:{u16 t[32];dst<u16>(w,d,m,src<u16>(w,s,t));break;}case 4:{u32 t[32];dst<u32>(w,d,m,src<u32>(w,s,t));break;}default:{u64 t[32];dst<u64>(w,d,m,src<u64>(w,s,t));}} return;}
  u64 tmp[32]={0}; if(s.k==O_VEC){int eb=n*8/s.v.size(); for(size_t k=0;k<s.v.size();k++){u64 t[32];auto p=src<u64>(w,s.v[k],t);for(int i=0;i<32;i++)tmp[i]|=(eb==64?p[i]:(p[i]&((1ull<<eb)-1)))<<(k*eb);} } else {u64 t[32];auto p=src<u64>(w,s,t);memcpy(tmp,p,256);}
  if(d.k==O_VEC){int eb=n*8/d.v.size(); for(size_t k=0;k<d.v.size();k++){u64 t[32];for(int i=0;i<32;i++)t[i]=(tmp[i]>>(k*eb))&((1ull<<eb)-1); if(d.v[k].k!=O_SINK)dst<u64>(w,d.v[k],m,t);} } else dst<u64>(w,d,m,tmp); }
static void mov128(Warp&w,const Ins&I,u32 m){u64 t[2][32];const u64*p[2];for(int h=0;h<2;h++)p[h]=src<u64>(w,I.o[1].v[h],t[h]);u64 r[2][32];for(int h=0;h<2;h++)memcpy(r[h],p[h],256);for(int h=0;h<2;h++)dst<u64>(w,I.o[0].v[h],m,r[h]);}
// ---------- compare
template<class T> static bool cmp(int c,T a,T b){ if constexpr(std::is_same<T,f16>::value||std::is_same<T,bf16>::value)return cmp<float>(c,(float)a,(float)b); else { bool un=false; if constexpr(std::is_floating_point<T>::value)un=std::isnan(a)||std::isnan(b);
 switch(c){case 0:return a==b;case 1:return !un&&a!=b;case 2:return a<b;case 3:return a<=b;case 4:return a>b;case 5:return a>=b;case 6:return un||a==b;case 7:return un||a!=b;case 8:return un||a<b;case 9:return un||a<=b;case 10:return un||a>b;case 11:return un||a>=b;case 12:return !un;case 13:return un;} return false;}}
static int cmpid(const string&s){static const char*n[]={"eq","ne","lt","le","gt","ge","equ","neu","ltu","leu","gtu","geu","num","nan"};for(int i=0;i<14;i++)if(s==n[i])return i; if(s=="lo")return 2;if(s=="ls")return 3;if(s=="hi")return 4;if(s=="hs")return 5;return -1;}
static Ty uns(Ty t){switch(t){case S8:return U8;case S16:return U16;case S32:return U32;case S64:return U64;default:return t;}}
template<class T> static void setp(Warp&w,const Ins&I,u32 m){T t[32],t1[32];auto a=srcf<T>(w,I,I.o[1],t);auto b=srcf<T>(w,I,I.o[2],t1);u8 r[32],r2[32]; switch(I.a){
#define CC(N) case N:for(int i=0;i<32;i++)r[i]=cmp<T>(N,a[i],b[i]);break;
 CC(0)CC(1)CC(2)CC(3)CC(4)CC(5) default:for(int i=0;i<32;i++)r[i]=cmp<T>(I.a,a[i],b[i]);}
 for(int i=0;i<32;i++)r2[i]=!r[i]; if(I.b){u32 c=predmask(w,I.o[3]);for(int i=0;i<32;i++){u8 x=c>>i&1; if(I.b==1){r[i]&=x;r2[i]&=x;} else if(I.b==2){r[i]|=x;r2[i]|=x;} else {r[i]^=x;r2[i]^=x;}}}
 if(I.o[0].k==O_LIST){dst<u8>(w,I.o[0].v[0],m,r);dst<u8>(w,I.o[0].v[1],m,r2);} else dst<u8>(w,I.o[0],m,r);}
template<class H> static void setp2(Warp&w,const Ins&I,u32 m){u32 t[32],t1[32];auto a=src<u32>(w,I.o[1],t);auto b=src<u32>(w,I.o[2],t1);u8 r[32],r2[32];for(int i=0;i<32;i++){H x,y,z,q;x.b=a[i];y.b=a[i]>>16;z.b=b[i];q.b=b[i]>>16;r[i]=cmp<H>(I.a,x,z);r2[i]=cmp<H>(I.a,y,q);} if(I.o[0].k==O_LIST){dst<u8>(w,I.o[0].v[0],m,r);dst<u8>(w,I.o[0].v[1],m,r2);} else dst<u8>(w,I.o[0],m,r);}
template<class T> static void setf(Warp&w,const Ins&I,u32 m){T t[32],t1[32];auto a=srcf<T>(w,I,I.o[1],t);auto b=srcf<T>(w,I,I.o[2],t1);u32 r[32];for(int i=0;i<32;i++)r[i]=cmp<T>(I.a,a[i],b[i])?(I.t==F32?0x3f800000u:I.t==F16?0x3c00:I.t==BF16?0x3f80:0xffffffffu):0;dst<u32>(w,I.o[0],m,r);}
template<class T> static void selp(Warp&w,const Ins&I,u32 m){T t[32],t1[32],r[32];auto a=src<T>(w,I.o[1],t);auto b=src<T>(w,I.o[2],t1);u32 c=predmask(w,I.o[3]);for(int i=0;i<32;i++)r[i]=(c>>i&1)?a[i]:b[i];dst<T>(w,I.o[0],m,r);}
// ---------- cvt
static double rnd(double x,int r){switch(r){case 1:return std::nearbyint(x);case 2:return std::trunc(x);case 3:return std::floor(x);case 4:return std::ceil(x);}return x;}
static float d2f(double d,int r){float f=(float)d; if(r==0||r==1||f!=f)return f; if(r==2){ if(std::fabs((double)f)>std::fabs(d))f=std::nextafterf(f,0);} else if(r==3){if((double)f>d)f=std::nextafterf(f,-INFINITY);} else if(r==4){if((double)f<d)f=std::nextafterf(f,INFINITY);} return f;}
static u16 f2h_r(float f,int r){ f16 h(f); float g=h; if(r<=1||f!=f)return h.b; auto towards0=[&](u16 b){return (b&0x7fff)?b-1:b;}; if(std::isinf(g)&&!std::isinf(f)){ if(r==2||(r==3&&f>0)||(r==4&&f<0))return (h.b&0x8000)|0x7bff; return h.b;} if(r==2&&std::fabs(g)>std::fabs(f))return towards0(h.b); if(r==3&&g>f)return (h.b&0x8000)?h.b+1:towards0(h.b); if(r==4&&g<f)return (h.b&0x8000)?towards0(h.b):h.b+1; return h.b;}
static u16 f2b_r(float f,int r){ if(r==2&&f==f){return __builtin_bit_cast(u32,f)>>16;} return bf16(f).b;}
static u8 f2e(float f,int eb,int mb,bool e4){ // satfinite RN
  if(f!=f)return e4?0x7f:0x7f; u8 s=std::signbit(f)?0x80:0; double a=std::fabs(f); double mx=e4?448.:57344.; if(a>mx)a=mx; int bias=e4?7:15; if(a==0)return s; int e; std::frexp(a,&e); e--; int em=std::max(e,1-bias); double q=std::ldexp(a,mb-em); double r=std::nearbyint(q); int mant=(int)r; if(mant>=(2<<mb)){mant>>=1;em++;} u8 v= mant<(1<<mb)? mant : ((em+bias)<<mb)|(mant-(1<<mb)); return s|v;}
static float e2f(u8 v,bool e4){ int mb=e4?3:2,bias=e4?7:15; int e=(v&0x7f)>>mb,mn=v&((1<<mb)-1); if(e4){if((v&0x7f)==0x7f)return NAN;} else if(e==31)return mn?NAN:(v&0x80?-INFINITY:INFINITY); double r=e?std::ldexp((1<<mb)+mn,e-bias-mb):std::ldexp(mn,1-bias-mb); return v&0x80?-r:r;}
static double getf(u64 x,Ty t){switch(t){case F32:return __builtin_bit_cast(float,(u32)x);case TF32:return __builtin_bit_cast(float,(u32)x);case F64:return __builtin_bit_cast(double,x);case F16:{f16 h;h.b=x;return (float)h;}case BF16:{bf16 h;h.b=x;return (float)h;}default:return 0;}}
static bool isf(Ty t){return t==F32||t==F64||t==F16||t==BF16||t==TF32;}
static u64 cvt1(const Ins&I,u64 x){ Ty d=I.t,s=I.t2; int r=I.rnd; 
  if(isf(s)){ if(s==F32&&I.ftz&&!(x&0x7f800000))x&=0x80000000u; double v=getf(x,s);
    if(isf(d)){ if(I.c)v=rnd(v,r); if(I.sat){v=v>0?(v<1?v:1.):0.;} if(I.has("relu")&&v<0)v=0; if(I.has("satfinite")&&d==F16&&std::fabs(v)>65504)v=std::copysign(65504.,v);
      switch(d){case F64:return __builtin_bit_cast(u64,v);case F32:{ if(s==F32&&!I.c&&!I.sat&&!I.has("relu"))return x&0xffffffffu; float f=d2f(v,I.c?0:r); u32 u=__builtin_bit_cast(u32,f); if(I.ftz&&!(u&0x7f800000))u&=0x80000000u; return u;} case F16: if(s==F64)return f16(v).b; return f2h_r((float)v,I.c?0:r); case BF16: if(s==F64)return bf16(v).b; return f2b_r((float)v,I.c?0:r); case TF32:{u32 u=(u32)x; if((u&0x7fffffff)>=0x7f800000)return u; if(I.rnd==1)u+=0xfff+((u>>13)&1); else if(I.rnd!=2)u+=0x1000; return u&~0x1fffu;} default:;} }
    if(v!=v)return (d==S64||d==U64||d==S32||d==U32)?(d==S64?0x8000000000000000ull:d==U64?0x8000000000000000ull:0):0; v=rnd(v,r?r:2); double lo,hi; switch(d){case S8:lo=-128;hi=127;break;case U8:lo=0;hi=255;break;case S16:lo=-32768;hi=32767;break;case U16:lo=0;hi=65535;break;case S32:lo=-2147483648.;hi=2147483647.;break;case U32:lo=0;hi=4294967295.;break;case S64: if(v>=9223372036854775808.)return 0x7fffffffffffffffull; if(v<=-9223372036854775808.)return 0x8000000000000000ull; return (u64)(s64)v; default: if(v<=0)return 0; if(v>=18446744073709551616.)return ~0ull; return (u64)v;} if(v<lo)v=lo; if(v>hi)v=hi; return (u64)(s64)v; }
  // int source
  s64 v; bool un=false; switch(s){case U8:case B8:v=(u8)x;break;case U16:case B16:v=(u16)x;break;case U32:case B32:v=(u32)x;break;case S8:v=(s8)x;break;case S16:v=(s16)x;break;case S32:v=(s32)x;break;case S64:v=x;break;default:v=x;un=true;}
  if(isf(d)){ switch(d){case F64:return __builtin_bit_cast(u64,un?(double)(u64)v:(double)v);case F32:{float f; if(r==2||r==3||r==4){long double L=un?(long double)(u64)v:(long double)v; f=(float)L; if(r==2&&fabsl((long double)f)>fabsl(L))f=std::nextafterf(f,0); if(r==3&&(long double)f>L)f=std::nextafterf(f,-INFINITY); if(r==4&&(long double)f<L)f=std::nextafterf(f,INFINITY);} else f=un?(float)(u64)v:(float)v; return __builtin_bit_cast(u32,f);}case F16:return f16(un?(double)(u64)v:(double)v).b;case BF16:return bf16(un?(double)(u64)v:(double)v).b;default:;} }
  if(I.sat){ auto cl=[&](s64 lo,s64 hi){ if(un&&(u64)v>(u64)hi)return hi; return v<lo&&!un?lo:(v>hi&&!un?hi:v);}; switch(d){case S8:v=cl(-128,127);break;case U8:v=cl(0,255);break;case S16:v=cl(-32768,32767);break;case U16:v=cl(0,65535);break;case S32:v=cl(INT32_MIN,INT32_MAX);break;case U32:v=cl(0,0xffffffffll);break;case U64:if(!un&&v<0)v=0;break;case S64:if(un&&v<0)v=INT64_MAX;break;default:;} }
  return v; }
static void cvt(Warp&w,const Ins&I,u32 m){ 
  if(I.t==F16X2||I.t==BF16X2){ u32 r[32]; if(I.o.size()==3){ u32 t[32],t1[32]; auto a=src<u32>(w,I.o[1],t),b=src<u32>(w,I.o[2],t1); bool rl=I.has("relu"); for(int i=0;i<32;i++){float x=__builtin_bit_cast(float,a[i]),y=__builtin_bit_cast(float,b[i]); if(rl){if(x<0)x=0;if(y<0)y=0;} u16 h=I.t==F16X2?f2h_r(x,I.rnd):f2b_r(x,I.rnd),l=I.t==F16X2?f2h_r(y,I.rnd):f2b_r(y,I.rnd); r[i]=(u32)h<<16|l;} } else { u16 t[32];auto a=src<u16>(w,I.o[1],t); bool e4=I.t2==E4M3X2; for(int i=0;i<32;i++){f16 h(e2f(a[i]>>8,e4)),l(e2f(a[i]&255,e4)); r[i]=(u32)h.b<<16|l.b;} } dst<u32>(w,I.o[0],m,r); return; }
  if(I.t==E4M3X2||I.t==E5M2X2){ u16 r[32]; bool e4=I.t==E4M3X2; if(I.o.size()==3){u32 t[32],t1[32];auto a=src<u32>(w,I.o[1],t),b=src<u32>(w,I.o[2],t1);for(int i=0;i<32;i++)r[i]=(u16)f2e(__builtin_bit_cast(float,a[i]),0,e4?3:2,e4)<<8|f2e(__builtin_bit_cast(float,b[i]),0,e4?3:2,e4);} else {u32 t[32];auto a=src<u32>(w,I.o[1],t);for(int i=0;i<32;i++){f16 x,y;x.b=a[i]>>16;y.b=a[i];r[i]=(u16)f2e(x,0,e4?3:2,e4)<<8|f2e(y,0,e4?3:2,e4);}} dst<u16>(w,I.o[0],m,r); return; }
  u64 t[32],r[32]; int sw=tsz(I.t2); const Opd&o=I.o[1]; if(sw==8){auto p=src<u64>(w,o,t); for(int i=0;i<32;i++)r[i]=cvt1(I,p[i]);} else if(sw==4){u32 q[32];auto p=src<u32>(w,o,q);
    if(I.t==F32&&I.t2==S32&&I.rnd<=1){for(int i=0;i<32;i++)r[i]=__builtin_bit_cast(u32,(float)(s32)p[i]);} else if((I.t==S64)&&I.t2==S32){for(int i=0;i<32;i++)r[i]=(s64)(s32)p[i];} else for(int i=0;i<32;i++)r[i]=cvt1(I,p[i]);} else if(sw==2){u16 q[32];auto p=src<u16>(w,o,q);for(int i=0;i<32;i++)r[i]=cvt1(I,p[i]);} else {u8 q[32];auto p=src<u8>(w,o,q);for(int i=0;i<32;i++)r[i]=cvt1(I,p[i]);}
  // trim to dest type then extend to reg
  int dw=tsz(I.t); bool sx=sgn(I.t); for(int i=0;i<32;i++){ if(dw==1)r[i]=sx?(u64)(s64)(s8)r[i]:(u8)r[i]; else if(dw==2)r[i]=sx?(u64)(s64)(s16)r[i]:(u16)r[i]; else if(dw==4)r[i]=sx?(u64)(s64)(s32)r[i]:(u32)r[i]; } dst<u64>(w,I.o[0],m,r); }
// ---------- misc int ops
static void mulwide(Warp&w,const Ins&I,u32 m){ u64 r[32]; bool mad=I.o.size()==4; switch(I.t){
 case U32:{u32 t[32],t1[32];auto a=src<u32>(w,I.o[1],t),b=src<u32>(w,I.o[2],t1);for(int i=0;i<32;i++)r[i]=(u64)a[i]*b[i];break;} case S32:{s32 t[32],t1[32];auto a=src<s32>(w,I.o[1],t),b=src<s32>(w,I.o[2],t1);for(int i=0;i<32;i++)r[i]=(s64)a[i]*b[i];break;}
 case U16:{u16 t[32],t1[32];auto a=src<u16>(w,I.o[1],t),b=src<u16>(w,I.o[2],t1);for(int i=0;i<32;i++)r[i]=(u32)a[i]*b[i];break;} case S16:{s16 t[32],t1[32];auto a=src<s16>(w,I.o[1],t),b=src<s16>(w,I.o[2],t1);for(int i=0;i<32;i++)r[i]=(s32)a[i]*b[i];break;} default:die("mul.wide type");}
 if(mad){u64 t[32];auto c=src<u64>(w,I.o[3],t);for(int i=0;i<32;i++)r[i]+=c[i];} dst<u64>(w,I.o[0],m,r);}
template<class T,class W> static T mulhi(T a,T b){return (T)(((W)a*(W)b)>>(sizeof(T)*8));}
static void shf(Warp&w,const Ins&I,u32 m){u32 t[32],t1[32],t2[32],r[32];auto a=src<u32>(w,I.o[1],t),b=src<u32>(w,I.o[2],t1),c=src<u32>(w,I.o[3],t2);for(int i=0;i<32;i++){u32 n=I.b?c[i]&31:std::min(c[i],32u);u64 v=(u64)b[i]<<32|a[i];r[i]=I.a?(u32)((v<<n)>>32):(n==32?b[i]:(u32)(v>>n)); if(I.a&&n==32)r[i]=a[i];}dst<u32>(w,I.o[0],m,r);}
static void lop3(Warp&w,const Ins&I,u32 m){u32 t[32],t1[32],t2[32],r[32];auto a=src<u32>(w,I.o[1],t),b=src<u32>(w,I.o[2],t1),c=src<u32>(w,I.o[3],t2);u8 l=I.o[4].imm;for(int i=0;i<32;i++){u32 x=0;if(l&1)x|=~a[i]&~b[i]&~c[i];if(l&2)x|=~a[i]&~b[i]&c[i];if(l&4)x|=~a[i]&b[i]&~c[i];if(l&8)x|=~a[i]&b[i]&c[i];if(l&16)x|=a[i]&~b[i]&~c[i];if(l&32)x|=a[i]&~b[i]&c[i];if(l&64)x|=a[i]&b[i]&~c[i];if(l&128)x|=a[i]&b[i]&c[i];r[i]=x;}dst<u32>(w,I.o[0],m,r);}
static void prmt(Warp&w,const Ins&I,u32 m){u32 t[32],t1[32],t2[32],r[32];auto a=src<u32>(w,I.o[1],t),b=src<u32>(w,I.o[2],t1),c=src<u32>(w,I.o[3],t2);for(int i=0;i<32;i++){u64 v=(u64)b[i]<<32|a[i];u32 x=0;for(int k=0;k<4;k++){u32 s=(c[i]>>(4*k))&15;if(I.a)die("prmt mode");u8 y=v>>(8*(s&7));if(s&8)y=(s8)y>>7;x|=(u32)y<<(8*k);}r[i]=x;}dst<u32>(w,I.o[0],m,r);}
template<class T> static void bfe(Warp&w,const Ins&I,u32 m){T t[32],r[32];u32 t1[32],t2[32];auto a=src<T>(w,I.o[1],t);auto b=src<u32>(w,I.o[2],t1),c=src<u32>(w,I.o[3],t2);const int N=sizeof(T)*8;for(int i=0;i<32;i++){u32 p=b[i]&255,l=c[i]&255;typedef typename std::make_unsigned<T>::type U; U x=0; bool sg=std::is_signed<T>::value; U sb= (!sg||l==0)?0:((U)a[i]>>std::min((int)p+(int)l-1,N-1))&1; for(int k=0;k<N;k++){U bit=(k<(int)l&&p+k<(u32)N)?((U)a[i]>>(p+k))&1:sb; x|=bit<<k;} r[i]=x;}dst<T>(w,I.o[0],m,r);}
template<class T> static void bfi(Warp&w,const Ins&I,u32 m){T t[32],t0[32],r[32];u32 t1[32],t2[32];auto a=src<T>(w,I.o[1],t),b=src<T>(w,I.o[2],t0);auto c=src<u32>(w,I.o[3],t1),d=src<u32>(w,I.o[4],t2);const int N=sizeof(T)*8;for(int i=0;i<32;i++){u32 p=c[i]&255,l=d[i]&255;T mk=0; if(p<(u32)N){mk=l>=(u32)N?~(T)0:(((T)1<<l)-1); mk<<=p; r[i]=(b[i]&~mk)|((a[i]<<p)&mk);} else r[i]=b[i];}dst<T>(w,I.o[0],m,r);}
template<class T,int OP> static void cnt(Warp&w,const Ins&I,u32 m){T t[32];u32 r[32];auto a=src<T>(w,I.o[1],t);for(int i=0;i<32;i++){ typedef typename std::make_unsigned<T>::type U; U x=a[i]; const int N=sizeof(T)*8; if(OP==0)r[i]=__builtin_popcountll(x); else if(OP==1)r[i]=x?__builtin_clzll((u64)x)-(64-N):N; else { if(std::is_signed<T>::value&&(T)x<0)x=~x; r[i]=x?63-__builtin_clzll((u64)x):0xffffffffu; if(I.a&&x)r[i]=N-1-r[i]; } }dst<u32>(w,I.o[0],m,r);}
template<class T> static void shift(Warp&w,const Ins&I,u32 m){T t[32],r[32];u32 t1[32];auto a=src<T>(w,I.o[1],t);auto b=src<u32>(w,I.o[2],t1);const u32 N=sizeof(T)*8;if(I.a)for(int i=0;i<32;i++)r[i]=b[i]>=N?(T)0:(T)(a[i]<<b[i]);else for(int i=0;i<32;i++)r[i]=b[i]>=N?(std::is_signed<T>::value?(T)(a[i]>>(N-1)):(T)0):(T)(a[i]>>b[i]);dst<T>(w,I.o[0],m,r);}
template<class T> static void carryop(Warp&w,const Ins&I,u32 m){ // add/sub with cc
 T t[32],t1[32],r[32];auto a=src<T>(w,I.o[1],t),b=src<T>(w,I.o[2],t1);u32 nc=0;for(int i=0;i<32;i++){u32 ci=I.b?(w.carry>>i&1):0;u128 x; if(!I.a){x=(u128)a[i]+b[i]+ci;r[i]=x;nc|=(u32)((x>>(sizeof(T)*8))&1)<<i;} else {x=(u128)a[i]-b[i]-ci;r[i]=x;nc|=(u32)((x>>(sizeof(T)*8))&1)<<i;}} if(I.c)w.carry=(w.carry&~m)|(nc&m);dst<T>(w,I.o[0],m,r);}
template<class T,class W> static void madc(Warp&w,const Ins&I,u32 m){T t[32],t1[32],t2[32],r[32];auto a=src<T>(w,I.o[1],t),b=src<T>(w,I.o[2],t1),c=src<T>(w,I.o[3],t2);u32 nc=0;for(int i=0;i<32;i++){W p=(W)a[i]*b[i];T q=I.d?(T)(p>>(sizeof(T)*8)):(T)p;u32 ci=I.b?(w.carry>>i&1):0;u128 x=(u128)q+c[i]+ci;r[i]=(T)x;nc|=(u32)((x>>(sizeof(T)*8))&1)<<i;} if(I.c)w.carry=(w.carry&~m)|(nc&m);dst<T>(w,I.o[0],m,r);}
static void frnd(Warp&w,const Ins&I,u32 m){ // directed rounding f32 add/sub/mul/fma/div/rcp/sqrt ; f64 falls to RN
 float t[32],t1[32],t2[32],r[32];auto a=srcf<float>(w,I,I.o[1],t);const float*b=I.o.size()>2?srcf<float>(w,I,I.o[2],t1):a;const float*c=I.o.size()>3?srcf<float>(w,I,I.o[3],t2):a;for(int i=0;i<32;i++){double x; switch(I.a){case 0:x=(double)a[i]+b[i];break;case 1:x=(double)a[i]-b[i];break;case 2:x=(double)a[i]*b[i];break;case 3:x=std::fma((double)a[i],(double)b[i],(double)c[i]);break;case 4:x=(double)a[i]/b[i];break;case 5:x=1.0/a[i];break;default:x=std::sqrt((double)a[i]);}r[i]=d2f(x,I.rnd);}dstf<float>(w,I,I.o[0],m,r);}
static void dp4a(Warp&w,const Ins&I,u32 m){u32 t[32],t1[32],t2[32],r[32];auto a=src<u32>(w,I.o[1],t),b=src<u32>(w,I.o[2],t1),c=src<u32>(w,I.o[3],t2);for(int i=0;i<32;i++){s32 s=c[i];for(int k=0;k<4;k++){s32 x=I.t==S32?(s32)(s8)(a[i]>>(8*k)):(s32)(u8)(a[i]>>(8*k));s32 y=I.t2==S32?(s32)(s8)(b[i]>>(8*k)):(s32)(u8)(b[i]>>(8*k));s+=x*y;}r[i]=s;}dst<u32>(w,I.o[0],m,r);}
static void testp(Warp&w,const Ins&I,u32 m){ u8 r[32]; double v[32]; if(I.t==F64){double t[32];auto a=src<double>(w,I.o[1],t);for(int i=0;i<32;i++)v[i]=a[i];} else {float t[32];auto a=src<float>(w,I.o[1],t);for(int i=0;i<32;i++)v[i]=a[i];} for(int i=0;i<32;i++)r[i]=I.a==0?std::isfinite(v[i]):I.a==1?std::isinf(v[i]):I.a==2?!std::isnan(v[i]):I.a==3?std::isnan(v[i]):I.a==4?(I.t==F64?std::isnormal(v[i]):std::isnormal((float)v[i])):std::fpclassify(I.t==F64?v[i]:(float)v[i])==FP_SUBNORMAL;dst<u8>(w,I.o[0],m,r);}
static void isspacep(Warp&w,const Ins&I,u32 m){u64 t[32];auto a=src<u64>(w,I.o[1],t);u8 r[32];for(int i=0;i<32;i++){u64 h=a[i]&WINM;r[i]=I.a==SHARED?h==SHW:I.a==LOCAL?h==LOW:I.a==PARAM?h==PAW:I.a==CONST?0:(h!=SHW&&h!=LOW&&h!=PAW);}dst<u8>(w,I.o[0],m,r);}
static void cvta(Warp&w,const Ins&I,u32 m){u64 t[32],r[32];auto a=src<u64>(w,I.o[1],t);u64 win=I.sp==SHARED?SHW:I.sp==LOCAL?LOW:I.sp==PARAM?PAW:0; for(int i=0;i<32;i++)r[i]=I.a?(win?a[i]&~WINM:a[i]):(win?((a[i]&~WINM)|win):a[i]);dst<u64>(w,I.o[0],m,r);}
// ---------- warp ops
static void shfl(Warp&w,const Ins&I,u32 m){u32 t[32],t1[32],t2[32],r[32];u8 p[32];auto a=src<u32>(w,I.o[1],t),b=src<u32>(w,I.o[2],t1),c=src<u32>(w,I.o[3],t2);for(int i=0;i<32;i++){u32 bv=b[i]&31,cv=c[i]&31,sm=(c[i]>>8)&31;u32 mx=(i&sm)|(cv&~sm),mn=i&sm;int j;bool ok;switch(I.a){case 0:j=i-(int)bv;ok=j>=(int)mx;break;case 1:j=i+bv;ok=j<=(int)mx;break;case 2:j=i^bv;ok=j<=(int)mx;break;default:j=mn|(bv&~sm);ok=j<=(int)mx;} if(!ok)j=i; r[i]=a[j&31];p[i]=ok; if((m>>i&1)&&ok&&!(m>>(j&31)&1)) r[i]=0xDEADBEEF; } if(I.o[0].k==O_LIST){dst<u32>(w,I.o[0].v[0],m,r);dst<u8>(w,I.o[0].v[1],m,p);} else dst<u32>(w,I.o[0],m,r);}
static void vote(Warp&w,const Ins&I,u32 m){u32 p=predmask(w,I.o[1]);u32 t[32];auto mk=src<u32>(w,I.o[2],t);u32 r[32];u8 q[32];for(int i=0;i<32;i++){u32 e=mk[i]&w.live;r[i]=p&e;q[i]=I.a==1?(p&e)!=0:I.a==2?(p&e)==e:((p&e)==e||!(p&e));} if(I.a==0)dst<u32>(w,I.o[0],m,r);else dst<u8>(w,I.o[0],m,q);}
template<class T> static void match(Warp&w,const Ins&I,u32 m){T t[32];u32 t1[32],r[32];u8 q[32];auto a=src<T>(w,I.o[1],t);auto mk=src<u32>(w,I.o[2],t1);for(int i=0;i<32;i++){u32 x=0,e=mk[i]&w.live;for(int j=0;j<32;j++)if((e>>j&1)&&a[j]==a[i])x|=1u<<j;q[i]=x==e;r[i]=I.a?x:(x==e?e:0);} if(I.o[0].k==O_LIST){dst<u32>(w,I.o[0].v[0],m,r);dst<u8>(w,I.o[0].v[1],m,q);} else dst<u32>(w,I.o[0],m,r);}
template<class T> static void redux(Warp&w,const Ins&I,u32 m){T t[32],r[32];u32 t1[32];auto a=src<T>(w,I.o[1],t);auto mk=src<u32>(w,I.o[2],t1);for(int i=0;i<32;i++){u32 e=mk[i]&w.live;bool f=true;T x=0;for(int j=0;j<32;j++)if(e>>j&1){T y=a[j];if(f){x=y;f=false;}else switch(I.a){case 0:x+=y;break;case 1:x=std::min(x,y);break;case 2:x=std::max(x,y);break;case 3:x&=y;break;case 4:x|=y;break;default:x^=y;}}r[i]=x;}dst<T>(w,I.o[0],m,r);}
static void activemask(Warp&w,const Ins&I,u32 m){u32 r[32];for(int i=0;i<32;i++)r[i]=m;dst<u32>(w,I.o[0],m,r);}
static void elect(Warp&w,const Ins&I,u32 m){u32 r[32];u8 p[32];u32 l=__builtin_ctz(m);for(int i=0;i<32;i++){r[i]=l;p[i]=(u32)i==l;} if(I.o[0].k==O_LIST){dst<u32>(w,I.o[0].v[0],m,r);dst<u8>(w,I.o[0].v[1],m,p);}}
// ---------- atomics
enum AO{A_ADD,A_MIN,A_MAX,A_AND,A_OR,A_XOR,A_EXCH,A_CAS,A_INC,A_DEC};
template<class T> static T aop(int op,T o,T b,T c){ if constexpr(std::is_same<T,f16>::value||std::is_same<T,bf16>::value){switch(op){case A_ADD:return T((float)o+(float)b);case A_MIN:return T(std::fmin((float)o,(float)b));case A_MAX:return T(std::fmax((float)o,(float)b));case A_EXCH:return b;case A_CAS:return o.b==b.b?c:o;}die("atom op");} else { switch(op){case A_ADD:return o+b;case A_MIN:return std::min(o,b);case A_MAX:return std::max(o,b);case A_EXCH:return b;case A_CAS:return o==b?c:o;case A_INC:return o>=b?(T)0:(T)(o+1);case A_DEC:return (o==0||o>b)?b:(T)(o-1);} if constexpr(std::is_integral<T>::value){switch(op){case A_AND:return o&b;case A_OR:return o|b;case A_XOR:return o^b;}} die("atom op");}}
template<class T,int X2> static void atom(Warp&w,const Ins&I,u32 m){ bool red=I.op=="red"; const Opd&ao=I.o[red?0:1];const Opd&bo=I.o[red?1:2]; AB A;addr(w,ao,A); int nv=bo.k==O_VEC?bo.v.size():1; int ne=X2?2:1; typedef typename std::conditional<X2,u32,T>::type E; E tb[4][32],tc[32],r[4][32]; const E*b[4];const E*c=tc; for(int k=0;k<nv;k++)b[k]=src<E>(w,bo.k==O_VEC?bo.v[k]:bo,tb[k]); if(I.a==A_CAS)c=src<E>(w,I.o[3],tc);
 for(u32 mm=m;mm;mm&=mm-1){int i=__builtin_ctz(mm);u8*p=ptr(w,I.sp,A.a[i],sizeof(E)*nv,i,"atomic");for(int k=0;k<nv;k++){ E o;memcpy(&o,p+k*sizeof(E),sizeof(E));r[k][i]=o; E n; if constexpr(X2!=0){u32 q=0;for(int h=0;h<ne;h++){T x,y;x.b=(u32)o>>(16*h);y.b=(u32)b[k][i]>>(16*h);T z=aop<T>(I.a,x,y,y);q|=(u32)z.b<<(16*h);}n=q;} else n=aop<T>(I.a,o,b[k][i],c[i]); memcpy(p+k*sizeof(E),&n,sizeof(E));}}
 if(!red){ if(I.o[0].k==O_VEC)for(int k=0;k<nv;k++)dst<E>(w,I.o[0].v[k],m,r[k]); else dst<E>(w,I.o[0],m,r[0]);} }
// ---------- cp.async
static void docp(Warp&w,const CpA&c,int l){u8*d=ptr(w,SHARED,c.dst,c.n,l,"cp.async store"); if(c.sn){u8*s=ptr(w,GLOBAL,c.src,1,l,"cp.async load"); checkRange(w,c.src,c.sn,"cp.async load"); memcpy(d,s,c.sn);} if(c.sn<c.n)memset(d+c.sn,0,c.n-c.sn);}
static void cpasync(Warp&w,const Ins&I,u32 m){AB A,B;addr(w,I.o[0],A);addr(w,I.o[1],B);u32 n=I.o[2].imm;u32 t[32];const u32*sz=nullptr;u32 ig=0;if(I.o.size()>3&&I.o[3].k!=O_NONE){ if(I.o[3].k==O_REG&&I.o[3].w==1)ig=predmask(w,I.o[3]); else if(!I.a||I.o.size()>=4) sz=src<u32>(w,I.o[3],t);} if(I.a&&I.o.size()==4)sz=nullptr; for(u32 mm=m;mm;mm&=mm-1){int i=__builtin_ctz(mm);u64 d=A.a[i];if((d&WINM)==SHW)d&=~WINM; if(B.a[i]%n) die("cp.async misaligned source 0x%llx",(unsigned long long)B.a[i]); CpA c{d,B.a[i],n,sz?std::min(sz[i],n):((ig>>i&1)?0:n)}; if(dev.defer){ // poison the destination until the copy is waited for
   u8*dp=ptr(w,SHARED,c.dst,c.n,i,"cp.async store"); memset(dp,0xFF,c.n); w.pend[i].push_back(c);} else docp(w,c,i);}}
static void cpcommit(Warp&w,const Ins&I,u32 m){ if(!dev.defer)return; for(u32 mm=m;mm;mm&=mm-1){int i=__builtin_ctz(mm);w.grp[i].push_back(std::move(w.pend[i]));w.pend[i].clear();}}
static void cpwait(Warp&w,const Ins&I,u32 m){ if(!dev.defer)return; bool all=I.a; size_t n=all?0:I.o[0].imm; for(u32 mm=m;mm;mm&=mm-1){int i=__builtin_ctz(mm);while(w.grp[i].size()>n){for(auto&c:w.grp[i].front())docp(w,c,i);w.grp[i].pop_front();} if(all){for(auto&c:w.pend[i])docp(w,c,i);w.pend[i].clear();}}}
// ---------- ldmatrix / stmatrix / mma
static void ldmatrix(Warp&w,const Ins&I,u32 m){AB A;addr(w,I.o[1],A);int n=I.a;u32 r[4][32];for(int k=0;k<n;k++){u8*row[8];for(int j=0;j<8;j++)row[j]=ptr(w,I.sp==GEN?GEN:SHARED,A.a[k*8+j],16,k*8+j,"ldmatrix");for(int l=0;l<32;l++){u16 x[2];for(int e=0;e<2;e++){int rr=l/4,cc=2*(l%4)+e;if(I.b)std::swap(rr,cc);memcpy(&x[e],row[rr]+2*cc,2);}r[k][l]=x[0]|(u32)x[1]<<16;}} if(I.o[0].k==O_VEC)for(int k=0;k<n;k++)dst<u32>(w,I.o[0].v[k],m,r[k]);else dst<u32>(w,I.o[0],m,r[0]);}
static void stmatrix(Warp&w,const Ins&I,u32 m){AB A;addr(w,I.o[0],A);int n=I.a;for(int k=0;k<n;k++){u32 t[32];auto s=src<u32>(w,I.o[1].k==O_VEC?I.o[1].v[k]:I.o[1],t);u8*row[8];for(int j=0;j<8;j++)row[j]=ptr(w,I.sp==GEN?GEN:SHARED,A.a[k*8+j],16,k*8+j,"stmatrix");for(int l=0;l<32;l++)for(int e=0;e<2;e++){int rr=l/4,cc=2*(l%4)+e;if(I.b)std::swap(rr,cc);u16 x=s[l]>>(16*e);memcpy(row[rr]+2*cc,&x,2);}}}
static void movmatrix(Warp&w,const Ins&I,u32 m){u32 t[32],r[32];auto s=src<u32>(w,I.o[1],t);for(int l=0;l<32;l++){u32 x=0;for(int e=0;e<2;e++){int rr=l/4,cc=2*(l%4)+e;int sl=cc*4+rr/2;x|=((s[sl]>>(16*(rr&1)))&0xffff)<<(16*e);}r[l]=x;}dst<u32>(w,I.o[0],m,r);}
static float el(u32 v,Ty t){switch(t){case F16:{f16 h;h.b=v;return h;}case BF16:{bf16 h;h.b=v;return h;}case TF32:return __builtin_bit_cast(float,v&~0x1fffu);case E4M3:return e2f(v,true);case E5M2:return e2f(v,false);default:return 0;}}
static void mma(Warp&w,const Ins&I,u32 m){ int M=I.a,N=I.b,K=I.c; Ty at=(Ty)I.t,bt=(Ty)I.t2; Ty ct=(Ty)I.d; Ty dt=(Ty)I.rnd; 
 auto vec=[&](const Opd&o,int k)->const Opd&{return o.k==O_VEC?o.v[k]:o;}; auto cntv=[&](const Opd&o){return o.k==O_VEC?(int)o.v.size():1;};
 if(at==F64){ static double a[16][16],b[16][8],c[16][8]; int nA=cntv(I.o[1]),nB=cntv(I.o[2]),nC=cntv(I.o[3]); double t[32]; for(int r=0;r<nA;r++){auto p=src<double>(w,vec(I.o[1],r),t);for(int l=0;l<32;l++){int row=(l>>2)+(M==16?8*(r&1):0),col=(l&3)+4*(M==16?r>>1:r);a[row][col]=p[l];}} for(int r=0;r<nB;r++){auto p=src<double>(w,vec(I.o[2],r),t);for(int l=0;l<32;l++)b[(l&3)+4*r][l>>2]=p[l];} for(int r=0;r<nC;r++){auto p=src<double>(w,vec(I.o[3],r),t);for(int l=0;l<32;l++)c[(l>>2)+8*(r>>1)][2*(l&3)+(r&1)]=p[l];} for(int i=0;i<M;i++)for(int j=0;j<N;j++){double s=c[i][j];for(int k=0;k<K;k++)s=std::fma(a[i][k],b[k][j],s);c[i][j]=s;} for(int r=0;r<nC;r++){double q[32];for(int l=0;l<32;l++)q[l]=c[(l>>2)+8*(r>>1)][2*(l&3)+(r&1)];dst<double>(w,vec(I.o[0],r),m,q);} return; }
 int eb=tsz(at)*8; if(at==S8||at==U8)eb=8; int pr=32/eb; int nA=cntv(I.o[1]),nB=cntv(I.o[2]); if(M!=16)die("mma shape m%dn%dk%d not supported",M,N,K); bool ii=at==S8||at==U8; u32 t[32];
 alignas(64) static float a[16][64],b[64][8],c[16][8]; alignas(64) static s32 ia[16][64],ib[64][8],ic[16][8];
 for(int r=0;r<nA;r++){auto p=src<u32>(w,vec(I.o[1],r),t);for(int l=0;l<32;l++)for(int e=0;e<pr;e++){int row=(l>>2)+8*(r&1),col=(l&3)*pr+e+(r>>1)*4*pr;u32 v=eb==32?p[l]:(p[l]>>(eb*e))&((1u<<eb)-1); if(ii)ia[row][col]=at==S8?(s32)(s8)v:(s32)v;else a[row][col]=el(v,at);}}
 for(int r=0;r<nB;r++){auto p=src<u32>(w,vec(I.o[2],r),t);for(int l=0;l<32;l++)for(int e=0;e<pr;e++){int k=(l&3)*pr+e+r*4*pr,n=l>>2;u32 v=eb==32?p[l]:(p[l]>>(eb*e))&((1u<<eb)-1); if(ii)ib[k][n]=bt==S8?(s32)(s8)v:(s32)v;else b[k][n]=el(v,bt);}}
 if(ii){for(int r=0;r<4;r++){auto p=src<u32>(w,vec(I.o[3],r),t);for(int l=0;l<32;l++)ic[(l>>2)+8*(r>>1)][2*(l&3)+(r&1)]=p[l];} for(int i=0;i<16;i++)for(int j=0;j<8;j++){s64 s=ic[i][j];for(int k=0;k<K;k++)s+=ia[i][k]*ib[k][j]; if(I.sat)s=std::max<s64>(INT32_MIN,std::min<s64>(INT32_MAX,s)); ic[i][j]=s;} for(int r=0;r<4;r++){u32 q[32];for(int l=0;l<32;l++)q[l]=ic[(l>>2)+8*(r>>1)][2*(l&3)+(r&1)];dst<u32>(w,vec(I.o[0],r),m,q);} return;}
 if(ct==F32){for(int r=0;r<4;r++){float tf[32];auto p=src<float>(w,vec(I.o[3],r),tf);for(int l=0;l<32;l++)c[(l>>2)+8*(r>>1)][2*(l&3)+(r&1)]=p[l];}} else for(int r=0;r<2;r++){auto p=src<u32>(w,vec(I.o[3],r),t);for(int l=0;l<32;l++)for(int e=0;e<2;e++){f16 h;h.b=p[l]>>(16*e);c[(l>>2)+8*r][2*(l&3)+e]=h;}}
 for(int i=0;i<16;i++){float s[8];double d[8]={0,0,0,0,0,0,0,0};for(int k=0;k<K;k++){double x=a[i][k];for(int j=0;j<8;j++)d[j]+=x*b[k][j];}for(int j=0;j<8;j++)s[j]=(float)(d[j]+c[i][j]);memcpy(c[i],s,32);}
 if(dt==F32){for(int r=0;r<4;r++){float q[32];for(int l=0;l<32;l++)q[l]=c[(l>>2)+8*(r>>1)][2*(l&3)+(r&1)];dst<float>(w,vec(I.o[0],r),m,q);}} else for(int r=0;r<2;r++){u32 q[32];for(int l=0;l<32;l++){u32 x=0;for(int e=0;e<2;e++)x|=(u32)f16(c[(l>>2)+8*r][2*(l&3)+e]).b<<(16*e);q[l]=x;}dst<u32>(w,vec(I.o[0],r),m,q);} }
// wmma: own fragment layout: slot = lane*perlane + j ; element = slot % total
static int wper(const Opd&o,int epr){return (int)o.v.size()*epr;}
static void wmmald(Warp&w,const Ins&I,u32 m){ // a:0=A,1=B,2=C ; M,N,K in b,c,d ; nv=1 row major
 AB A;addr(w,I.o[1],A);u32 ldv=0;int R=I.a==0?I.b:I.a==1?I.d:I.b,C=I.a==0?I.d:I.a==1?I.c:I.c;bool row=I.nv;int es=tsz(I.t);int epr=4/es;u32 ts[32];if(I.o.size()>2)ldv=src<u32>(w,I.o[2],ts)[__builtin_ctz(m)];else ldv=row?C:R;int per=wper(I.o[0],epr),tot=R*C;u64 base=A.a[__builtin_ctz(m)];
 for(size_t r=0;r<I.o[0].v.size();r++){u32 q[32];for(int l=0;l<32;l++){u32 x=0;for(int e=0;e<epr;e++){int s=(l*per+(int)r*epr+e)%tot;int i=s/C,j=s%C;u64 ad=base+(u64)es*(row?(u64)i*ldv+j:(u64)j*ldv+i);u32 v=0;memcpy(&v,ptr(w,I.sp,ad,es,l,"wmma.load"),es);x|=v<<(8*es*e);}q[l]=x;}dst<u32>(w,I.o[0].v[r],m,q);} }
static void wmmast(Warp&w,const Ins&I,u32 m){AB A;addr(w,I.o[0],A);int R=I.b,C=I.c;bool row=I.nv;int es=tsz(I.t),epr=4/es;u32 ts[32];u32 ldv=row?C:R;if(I.o.size()>2)ldv=src<u32>(w,I.o[2],ts)[__builtin_ctz(m)];int per=wper(I.o[1],epr),tot=R*C;u64 base=A.a[__builtin_ctz(m)];for(size_t r=0;r<I.o[1].v.size();r++){u32 t[32];auto q=src<u32>(w,I.o[1].v[r],t);for(int l=0;l<32;l++)for(int e=0;e<epr;e++){int s=(l*per+(int)r*epr+e)%tot;int i=s/C,j=s%C;u64 ad=base+(u64)es*(row?(u64)i*ldv+j:(u64)j*ldv+i);u32 v=q[l]>>(8*es*e);if(es==4)v=q[l];memcpy(ptr(w,I.sp,ad,es,l,"wmma.store"),&v,es);}}}
static void wfrag(Warp&w,const Opd&o,Ty t,int R,int C,float*out){int es=tsz(t),epr=4/es,per=wper(o,epr),tot=R*C;for(size_t r=0;r<o.v.size();r++){u32 tt[32];auto q=src<u32>(w,o.v[r],tt);for(int l=0;l<32;l++)for(int e=0;e<epr;e++){int s=l*per+(int)r*epr+e;if(s>=tot)continue;u32 v=es==4?q[l]:(q[l]>>(16*e))&0xffff;out[s]=t==F32?__builtin_bit_cast(float,v):el(v,t);}}}
static void wmmamma(Warp&w,const Ins&I,u32 m){int M=I.b,N=I.c,K=I.d;static float a[1024],b[1024],c[1024];Ty at=I.t,ct=I.t2,dt=(Ty)I.rnd;wfrag(w,I.o[1],at,M,K,a);wfrag(w,I.o[2],at,K,N,b);wfrag(w,I.o[3],ct,M,N,c);for(int i=0;i<M;i++){double d[32]={0};for(int k=0;k<K;k++)for(int j=0;j<N;j++)d[j]+=(double)a[i*K+k]*b[k*N+j];for(int j=0;j<N;j++)c[i*N+j]=(float)(d[j]+c[i*N+j]);}
 int es=tsz(dt),epr=4/es,per=wper(I.o[0],epr),tot=M*N;for(size_t r=0;r<I.o[0].v.size();r++){u32 q[32];for(int l=0;l<32;l++){u32 x=0;for(int e=0;e<epr;e++){int s=(l*per+(int)r*epr+e)%tot;x|=dt==F32?__builtin_bit_cast(u32,c[s]):(u32)f16(c[s]).b<<(16*e);}q[l]=x;}dst<u32>(w,I.o[0].v[r],m,q);}}
static void nop(Warp&,const Ins&,u32){}
#include "count.inc"
#include "parse.inc"
#include "run.inc"
